"""Weights in integers: made at load (rounding.py), or as published (awq.py, gptq.py), and what that costs
(quality.py).
"""
