"""What the demo's model says, as transformers makes of the same weights, too: see test_demo.py."""

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
