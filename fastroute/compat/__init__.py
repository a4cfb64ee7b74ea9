"""The upstreams' import paths, on fastroute's layers."""
