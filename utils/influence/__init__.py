"""Influence functions: curvature factors, preconditioned gradients, scores. Only this package touches kronfluence."""
