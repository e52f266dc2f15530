"""Batch inference of language models too big for any one of your GPUs, over RabbitMQ."""

__version__ = "0.1.0"
