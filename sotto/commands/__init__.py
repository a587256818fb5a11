"""The commands, one module each. A module imports what it needs inside its functions: `sotto --help` loads no torch,
and `sotto worker` never loads key code."""
