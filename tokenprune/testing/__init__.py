"""Tools for proving a strategy or an engine right: tiny models, random schedules, the masked full-length oracle."""
