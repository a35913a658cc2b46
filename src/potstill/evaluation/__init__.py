"""Was it worth it: metrics, fidelity, significance, cost."""
