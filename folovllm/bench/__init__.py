"""Workloads and the scripts that run them. Nothing here knows one stage from another: requests are plain token ids and
numbers, and every stage is driven through the public methods of its `LLM`."""
