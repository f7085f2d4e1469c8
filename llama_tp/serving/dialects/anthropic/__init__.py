"""Anthropic's Messages API below /predictions/<model>/<version>/v1/messages."""
