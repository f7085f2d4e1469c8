"""Bytes to requests and results to bytes, in the dialects that clients speak. Text in, text out."""
