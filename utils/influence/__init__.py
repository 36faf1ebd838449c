"""Influence functions: curvature factors, preconditioned gradients, scores. Only this and tasks/ touch kronfluence."""
