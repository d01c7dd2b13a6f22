"""Movers: Celery workers that claim work units and copy them. They know the ledger and the model, never the service."""
