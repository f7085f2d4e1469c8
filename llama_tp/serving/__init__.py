"""Turns bytes into requests and results into bytes, in the dialects that clients speak. Text in, text out."""
