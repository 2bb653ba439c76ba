{{- define "slr.name" -}}
{{- if contains "slr" .Release.Name }}{{ .Release.Name | trunc 53 | trimSuffix "-" }}{{ else }}{{ printf "%s-slr" .Release.Name | trunc 53 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "slr.selector" -}}
app.kubernetes.io/name: slr
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "slr.labels" -}}
{{ include "slr.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "slr.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ required "set image.digest, or image.tag for a test" .tag }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The drain: settings.grace_s, 5 s for the last responses, 5 s after which the process ends itself; 5 s to spare. */}}
{{- define "slr.grace" -}}
{{ add .Values.preStopSeconds (ceil .Values.settings.grace_s | int) 15 }}
{{- end }}

{{- /*
Queued and running answers of all pods: one number. A pod that Prometheus cannot read counts as one at its target, so
that a lost pod does not look like less load. If no pod can be read, the result is empty, which KEDA takes for a failure.
*/}}
{{- define "slr.load" -}}
{{- $pods := printf "namespace=%q,service=%q" .Release.Namespace (include "slr.name" .) -}}
sum(slr_requests_queued{ {{- $pods -}} }) + sum(slr_slots_in_use{ {{- $pods -}} }) + {{ .Values.autoscaling.answersPerReplica | int }} * (count(up{ {{- $pods -}} } == 0) or vector(0))
{{- end }}
