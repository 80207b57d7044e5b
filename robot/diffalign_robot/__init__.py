"""Robot adapter: simulators, demonstrations and policies of action chunks for the diffalign core."""
