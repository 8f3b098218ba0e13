"""The experiments behind the documented results: tasks, the protocol and the demonstration."""
