"""Who may connect: bearer tokens, PEM files and ssl contexts. gRPC's part is proto/connections.py."""
