"""Evaluations of a trained model: zero-shot classification and retrieval, on one rank or all of them."""
