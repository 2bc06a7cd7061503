"""The lmms-eval plugin of EvoTok: the model adapter, the tasks and their judges."""
