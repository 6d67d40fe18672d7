"""The code that exports of this family bring with them, for transformers. Nothing in this package imports it: it is
copied into exported folders, and needs torch and transformers alone."""
