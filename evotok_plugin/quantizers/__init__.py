"""The kinds of quantizers behind one interface, their gradients, and the choice by configuration."""
