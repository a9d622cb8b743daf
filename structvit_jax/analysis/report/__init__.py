"""Compare runs on one HTML page: scores, curves, wall time, results by class, most confident errors."""
