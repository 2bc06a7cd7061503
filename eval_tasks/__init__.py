"""EvoTok's lmms-eval plug-in: the model adapter, the tasks and their judges. Importing this costs nothing."""
