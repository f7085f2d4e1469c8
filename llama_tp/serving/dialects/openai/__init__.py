"""OpenAI's API below /predictions/<model>/<version>/v1/, with vLLM's extensions."""
