"""The bundled demo model: a small bilingual finance Mixture-of-Experts and the seeded recipe that trains it."""
