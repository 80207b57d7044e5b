"""diffalign: one policy-optimisation core that aligns everything that denoises."""

__version__ = "0.1.0"
