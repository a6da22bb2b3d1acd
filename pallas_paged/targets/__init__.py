"""Descriptions of GPUs to compile for: text protos of XLA's GPU target config, public figures."""
