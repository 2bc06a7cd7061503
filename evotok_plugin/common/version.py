"""The version of all three packages."""

VERSION = "0.2.0"
