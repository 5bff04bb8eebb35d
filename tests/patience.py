"""How long tests wait for what a hang would keep from coming."""

PATIENCE = 900.0  # seconds, since a busy machine may stop for minutes; no test waits for its end
