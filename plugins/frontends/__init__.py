"""Front-ends: other people's group formats, translated into ours."""
