"""rbee: one LLM inference cluster from every machine you can SSH into."""

__version__ = "0.1.0"
