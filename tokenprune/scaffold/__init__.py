"""New plugin packages from templates: names that are checked, files that are rendered, a folder that is written."""

from __future__ import annotations
