"""The edge, imported as moe_runtime.server: HTTP in, engine calls out."""
