import re

from django import forms

from emails.models import Email


class EmailForm(forms.Form):
    to = forms.CharField(
        label="To",
        help_text="Addresses, separated by commas or spaces",
        widget=forms.TextInput(attrs={"autocomplete": "off", "inputmode": "email"}),
    )
    subject = forms.CharField(max_length=Email._meta.get_field("subject").max_length)
    text = forms.CharField(label="Message", widget=forms.Textarea(attrs={"rows": 6}))

    def clean_to(self) -> list[str]:
        return [part for part in re.split(r"[\s,;]+", self.cleaned_data["to"]) if part]
