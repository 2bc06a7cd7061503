"""EvoTok in other code bases: as a vision model of transformers and as a vision tower of LLaVA."""
