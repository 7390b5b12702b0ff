"""Clouds to rent machines from, one file each, under one contract: ``ports.Provisioner``."""
