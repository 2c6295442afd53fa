"""What `pdserve bench` measures."""
