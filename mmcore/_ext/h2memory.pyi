"""Memory for nghttp2: small blocks come from free lists and go back to them."""
