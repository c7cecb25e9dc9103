"""Who learns: freeze, detach, policies and roles."""
