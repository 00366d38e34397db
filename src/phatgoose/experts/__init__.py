"""What lies on disk: adapters, gates, pools."""
