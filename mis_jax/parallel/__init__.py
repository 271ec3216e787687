"""Devices and processes: shardings, attention kernels of each back end, hosts of a run."""
