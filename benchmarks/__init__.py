"""Measurements that are too slow or too dependent on a machine for the tests. See README.md."""
