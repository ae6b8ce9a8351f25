"""Listeners and services: the KServe v2 service, and the node that builds, starts and drains an instance."""
