"""OpenAI's Responses API below /predictions/<model>/<version>/v1/responses. Nothing is stored."""
