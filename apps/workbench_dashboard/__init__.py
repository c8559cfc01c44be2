"""The Streamlit dashboard: `app.py` finds its pages in `views/`, one script each; the modules beside it are what they share."""
