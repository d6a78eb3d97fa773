"""Encore's library: small flat modules, each with one job. The stages of the pipeline are in `stages/`."""
