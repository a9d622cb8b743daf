"""What runs came to, as one HTML page: side by side, and then each one's classes and hardest examples."""
