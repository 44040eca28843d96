"""Workloads: arrival processes, length distributions, recorded traces."""
