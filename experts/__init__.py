"""The expert domain, imported as moe_runtime.experts: offline decisions over plain data."""
