"""The only room that talks to providers: Celery processes that run chat jobs."""
