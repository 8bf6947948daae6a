"""What a release tells people: manifest, verdict, charts, report."""
