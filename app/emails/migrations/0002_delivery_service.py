import django.db.models.deletion
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models

import emails.models


class Migration(migrations.Migration):
    dependencies = [
        ("emails", "0001_initial"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="Allowance",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "senders",
                    models.TextField(
                        blank=True,
                        help_text="Addresses and @domains, separated by spaces. Empty: those of the settings.",
                    ),
                ),
                (
                    "recipients_per_hour",
                    models.PositiveIntegerField(
                        blank=True, help_text="Empty: as the settings say. 0: nothing.", null=True
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Attachment",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("filename", models.CharField(blank=True, max_length=255)),
                ("content_type", models.CharField(max_length=127)),
                ("content_id", models.CharField(blank=True, max_length=255)),
                ("content", models.BinaryField()),
            ],
            options={
                "ordering": ("id",),
            },
        ),
        migrations.CreateModel(
            name="Attempt",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("number", models.PositiveIntegerField()),
                ("started_at", models.DateTimeField()),
                ("seconds", models.FloatField()),
                (
                    "outcome",
                    models.CharField(
                        choices=[
                            ("queued", "Queued"),
                            ("sending", "Sending"),
                            ("deferred", "Deferred"),
                            ("uncertain", "Uncertain"),
                            ("sent", "Sent"),
                            ("failed", "Failed"),
                        ],
                        max_length=9,
                    ),
                ),
                ("smtp_code", models.PositiveSmallIntegerField(blank=True, null=True)),
                ("answer", models.CharField(blank=True, max_length=500)),
            ],
            options={
                "ordering": ("id",),
            },
        ),
        migrations.CreateModel(
            name="Tally",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=40)),
                ("bucket", models.FloatField(default=0)),
                ("slot", models.PositiveSmallIntegerField()),
                ("total", models.BigIntegerField(default=0)),
                ("seconds", models.FloatField(default=0)),
            ],
            options={
                "verbose_name_plural": "tallies",
            },
        ),
        migrations.AlterModelOptions(
            name="delivery",
            options={
                "ordering": ("id",),
                "permissions": [("replay_delivery", "Can send dead deliveries once more")],
                "verbose_name_plural": "deliveries",
            },
        ),
        migrations.RemoveIndex(
            model_name="delivery",
            name="unfinished_deliveries",
        ),
        # A new name in the code alone: processes of the release before this one go on working.
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.RenameField("delivery", "next_attempt_at", "due_at"),
                migrations.AlterField(
                    model_name="delivery",
                    name="due_at",
                    field=models.DateTimeField(
                        db_column="next_attempt_at", default=django.utils.timezone.now
                    ),
                ),
            ],
        ),
        migrations.AlterField(
            model_name="delivery",
            name="due_at",
            field=models.DateTimeField(
                blank=True, db_column="next_attempt_at", default=emails.models.AT_ONCE, null=True
            ),
        ),
        migrations.AddField(
            model_name="delivery",
            name="data_sent",
            field=models.BooleanField(db_default=False, default=False),
        ),
        migrations.AddField(
            model_name="delivery",
            name="expires_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name="delivery",
            name="kind",
            field=models.CharField(
                choices=[("to", "To"), ("cc", "Cc"), ("bcc", "Bcc")],
                db_default="to",
                default="to",
                max_length=3,
            ),
        ),
        migrations.AddField(
            model_name="delivery",
            name="started_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name="delivery",
            name="uncertain_attempts",
            field=models.PositiveIntegerField(db_default=0, default=0),
        ),
        migrations.AddField(
            model_name="email",
            name="digest",
            field=models.CharField(blank=True, db_default="", default="", max_length=64),
        ),
        migrations.AddField(
            model_name="email",
            name="headers",
            field=models.JSONField(blank=True, db_default={}, default=dict),
        ),
        migrations.AddField(
            model_name="email",
            name="idempotency_key",
            field=models.CharField(blank=True, max_length=255, null=True),
        ),
        migrations.AddField(
            model_name="email",
            name="reply_to",
            field=models.JSONField(blank=True, db_default=[], default=list),
        ),
        migrations.AddField(
            model_name="email",
            name="request_id",
            field=models.CharField(blank=True, db_default="", default="", max_length=64),
        ),
        migrations.AddField(
            model_name="email",
            name="show_recipients",
            field=models.BooleanField(db_default=False, default=False),
        ),
        migrations.AlterField(
            model_name="delivery",
            name="lease_until",
            field=models.DateTimeField(blank=True, editable=False, null=True),
        ),
        migrations.AlterField(
            model_name="delivery",
            name="state",
            field=models.CharField(
                choices=[
                    ("queued", "Queued"),
                    ("sending", "Sending"),
                    ("deferred", "Deferred"),
                    ("uncertain", "Uncertain"),
                    ("sent", "Sent"),
                    ("failed", "Failed"),
                ],
                default="queued",
                max_length=9,
            ),
        ),
        migrations.AlterField(
            model_name="email",
            name="owner",
            field=models.ForeignKey(
                blank=True,
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="emails",
                to=settings.AUTH_USER_MODEL,
            ),
        ),
        migrations.AlterField(
            model_name="email",
            name="text",
            field=models.TextField(blank=True),
        ),
        migrations.AddIndex(
            model_name="delivery",
            index=models.Index(
                condition=models.Q(("state__in", ("queued", "sending", "deferred", "uncertain"))),
                fields=["due_at", "id"],
                name="due_deliveries",
            ),
        ),
        migrations.AddIndex(
            model_name="delivery",
            index=models.Index(
                condition=models.Q(("state__in", ("failed", "uncertain"))),
                fields=["-id"],
                name="dead_deliveries",
            ),
        ),
        migrations.AddIndex(
            model_name="email",
            index=models.Index(fields=["owner", "-created_at"], name="emails_of_an_owner"),
        ),
        migrations.AddConstraint(
            model_name="email",
            constraint=models.UniqueConstraint(
                fields=("owner", "idempotency_key"), name="one_email_a_key_and_owner"
            ),
        ),
        migrations.AddConstraint(
            model_name="email",
            constraint=models.UniqueConstraint(
                condition=models.Q(("owner", None)),
                fields=("idempotency_key",),
                name="one_email_a_key",
            ),
        ),
        migrations.AddField(
            model_name="allowance",
            name="owner",
            field=models.OneToOneField(
                on_delete=django.db.models.deletion.CASCADE,
                related_name="allowance",
                to=settings.AUTH_USER_MODEL,
            ),
        ),
        migrations.AddField(
            model_name="attachment",
            name="email",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.CASCADE,
                related_name="attachments",
                to="emails.email",
            ),
        ),
        migrations.AddField(
            model_name="attempt",
            name="delivery",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.CASCADE,
                related_name="log",
                to="emails.delivery",
            ),
        ),
        migrations.AddConstraint(
            model_name="tally",
            constraint=models.UniqueConstraint(
                fields=("name", "bucket", "slot"), name="one_tally_a_slot"
            ),
        ),
    ]
