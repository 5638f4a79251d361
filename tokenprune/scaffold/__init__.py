"""New plugin packages from templates: names that are checked, files that are rendered, a folder that is written.

Goes here: what `tokenprune new` needs. A new kind of package is a folder in `templates/`, and an entry of `KIND` in
`package`.
"""

from __future__ import annotations
