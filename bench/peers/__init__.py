"""The servers that mmcore is measured beside, and the tiny one of its own transport; each prints one ready line."""
