"""The bundled demo model: a small bilingual finance Mixture-of-Experts and its seeded training recipe."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # the shipped Hugging Face folder
